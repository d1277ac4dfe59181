"""Evaluation: questions -> any responder -> answers -> score -> table."""
