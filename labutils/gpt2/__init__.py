"""A GPT-2 on the lab's attention: the model, its positions, its texts, and how fast it runs."""
