"""Prompts of the demo: sixteen to show and measure on, three hundred others to calibrate with."""

from __future__ import annotations

#: Varied on purpose: chat, lists, code, arithmetic, translation, a story, a letter; ragged lengths.
SHOWN = (
    "What is gravity?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "List five tips for a good night's sleep.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "If a train travels 60 miles in one and a half hours, what is its average speed? Show each step.",
    "Translate to French: The weather is nice today and we are going to the park.",
    "Who was Marie Curie and why is she remembered?",
    "Give me a simple recipe for vegetable soup with what I probably have at home: carrots, potatoes, onions and salt.",
    "Explain the difference between a virus and a bacterium to a ten year old.",
    "Write a polite e-mail to my landlord about a leaking tap in the kitchen that has been dripping for two weeks.",
    "What are the planets of the solar system, in order?",
    "Summarise in two sentences: The industrial revolution began in Britain in the late eighteenth century. Machines "
    "replaced hand work, cities grew quickly, and railways connected them. Living standards rose slowly at first and "
    "unevenly, while working hours were long and conditions in factories were harsh.",
    "Hello! How are you?",
    "Write a four line poem about the sea in winter.",
    "What should I consider before buying a used bicycle?",
    "Complete the sentence and continue for a paragraph: Once the city lights went out,",
)

_TOPICS = (
    "bicycles", "the Silk Road", "origami", "earthquakes", "beekeeping", "the periodic table", "sailing", "opera",
    "tax returns", "penguins", "the printing press", "knitting", "quantum computers", "marathon training", "cheese making",
    "dinosaurs", "stage fright", "the Amazon river", "lighthouses", "double entry bookkeeping", "honey", "the human eye",
    "skiing", "comets", "railways", "mushrooms", "first aid", "the Vikings", "salt", "haiku", "batteries", "tides",
    "sign language", "elephants", "compound interest", "silk moths", "refrigerators", "Mount Everest",
    "hypotheses and theories", "pottery", "sharks", "the Renaissance", "time zones", "fermentation", "public libraries",
    "wind turbines", "the violin", "deserts", "allergies", "crossword puzzles", "submarines", "the alphabet", "orchards",
    "probability", "the Panama canal", "owls", "friendship", "concrete", "the Aurora borealis", "stamp collecting",
)  # fmt: skip
_FORMS = (
    "Tell me something surprising about {}.",
    "How did {} change the world?",
    "Write a dialogue in which two friends talk about {}.",
    "What do people often get wrong about {}?",
    "I have ten minutes. Teach me the basics of {}.",
)


def calibrating() -> list[str]:
    """Three hundred prompts that no training has seen, every topic before a topic comes again."""
    count = len(_TOPICS) * len(_FORMS)
    return [_FORMS[(i + i // len(_TOPICS)) % len(_FORMS)].format(_TOPICS[i % len(_TOPICS)]) for i in range(count)]
