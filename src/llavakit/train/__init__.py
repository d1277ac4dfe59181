"""The two stages of LLaVA: ``stages`` says what learns, ``loop`` runs it, ``state`` keeps it safe."""
