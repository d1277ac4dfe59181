"""Instruction data: what is known of pictures -> a teacher -> conversations to train on (spec 5)."""
