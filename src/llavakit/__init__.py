"""llavakit: LLaVA, whole, exact and maintained. Importing it is instant; torch loads where it is used."""

from llavakit.types import Conversation, Image, Message, Sampling, Text

__all__ = ["Conversation", "Image", "Message", "Sampling", "Text", "__version__"]
__version__ = "0.1.0"
