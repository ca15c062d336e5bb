"""hificl-lab: adapt a frozen multimodal model by approximating in-context learning."""
