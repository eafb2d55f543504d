"""What the demo does where nothing else is asked for. Imported before any command is known."""

PROMPT = (
    "Write a very long adventure story, with much dialogue, about a young sailor called Nora who crosses an unknown "
    "sea. Describe each day of the journey."
)
WINDOW, TOKENS = 192, 900  # several windows in about a minute, at 15 tokens a second
