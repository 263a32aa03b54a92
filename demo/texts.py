"""Raw material of the text tasks: topics, sentence templates, things to count."""

from __future__ import annotations

TOPICS: dict[str, tuple[str, ...]] = {
    "sport": ("goal", "match", "team", "coach", "race", "tennis", "football", "medal"),
    "food": ("soup", "bread", "cheese", "pasta", "salad", "recipe", "cake", "rice"),
    "weather": ("rain", "storm", "snow", "wind", "sunshine", "fog", "thunder", "frost"),
    "music": ("song", "guitar", "concert", "piano", "violin", "melody", "choir", "drum"),
    "travel": ("train", "airport", "hotel", "ticket", "passport", "ferry", "luggage", "flight"),
}

OPENINGS = ("", "", "Listen: ", "By the way: ", "Dear Anna, hello! ", "Well, well. ", "Good morning! ", "Yes. ", "No! ")

SENTENCES = (
    "Everyone talked about the {} today.",
    "I am still thinking of the {}.",
    "The {} was better than last year.",
    "My sister wrote to me about the {}.",
    "Have you heard about the {}?",
    "We waited a long time for the {}.",
    "They say the {} will be late.",
    "Nobody expected such a {}!",
    "What a {} that was!",
    "After the {} we all went home.",
    "The news this morning began with the {}.",
    "He never forgets a good {}.",
)

THINGS: dict[str, tuple[str, ...]] = {
    "fruit": ("apple", "pear", "plum", "lemon"),
    "animal": ("dog", "cat", "horse", "duck"),
    "tool": ("hammer", "saw", "drill", "spade"),
}


def counted(count: int, noun: str) -> str:
    """`1 tool`, `3 tools`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
