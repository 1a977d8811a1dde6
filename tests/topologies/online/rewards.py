"""A reward of the user's own, for topologies of tests: it differs between the responses of a model that knows nothing."""


def short_words(prompt: object, response: str) -> float:  # noqa: ARG001 (the face of a reward)
    """Share of characters that are letters or spaces, and less for a long text."""
    letters = sum(character.isalpha() or character == " " for character in response)
    return letters / max(1, len(response)) - 0.01 * len(response)
