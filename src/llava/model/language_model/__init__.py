"""One module a language model, as before."""
