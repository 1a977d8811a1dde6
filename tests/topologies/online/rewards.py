# ruff: noqa: ARG001 (the face of a reward)
"""A reward of the user's own, for topologies of tests: it differs between the responses of a model that knows nothing."""


def short_words(prompt: str, response: str, data: object) -> float:
    """Share of characters that are letters or spaces, and less for a long text."""
    letters = sum(character.isalpha() or character == " " for character in response)
    return letters / max(1, len(response)) - 0.01 * len(response)


def broken(prompt: str, response: str, data: object) -> float:
    """A mistake of the user's."""
    raise KeyError("no such column")


def sometimes(prompt: str, response: str, data: object) -> float:
    """Fails for about half of all texts."""
    if len(response) % 2:
        raise KeyError("no such column")
    return short_words(prompt, response, data)
