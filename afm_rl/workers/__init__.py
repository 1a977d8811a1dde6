"""Code that may hang, crash or eat memory (a user's reward, a computer algebra system) in processes of its own."""
