"""One task of the merge, by transformers and PEFT alone."""

from transformers import pipeline

topics = ["car", "banking", "credit cards", "home", "food", "settings", "small talk", "travel", "utility", "work"]
head = {"num_labels": 10, "id2label": dict(enumerate(topics))}
classify = pipeline("text-classification", model="merged-clinc", tokenizer="base", model_kwargs=head)
for request in ("is there enough money in my bank account", "find me a flight to rome"):
    print(request, "->", classify(request)[0]["label"])
