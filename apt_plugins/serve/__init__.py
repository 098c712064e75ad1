"""``apt-serve``: a run's model behind OpenAI's protocol, with a chat page of its own."""
