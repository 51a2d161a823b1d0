"""Chat templates: which one a run uses, and putting it around a prompt."""

from __future__ import annotations

from .errors import UserError

#: What `--chat_template` accepts; `auto` becomes one of the others by the model's name.
CHAT_TEMPLATES = ("auto", "none", "model", "llama2", "vicuna")

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: {prompt} ASSISTANT:"
)


def resolve_chat_template(choice: str, model_name: str, tokenizer) -> str:
    """Return which template a run uses: `none`, `model` (the tokenizer's own), `llama2` or `vicuna`.

    `auto` follows the paper's code by the model's name: the tokenizer's own template for Llama-3 Instruct
    models, vicuna's for longchat, none for Mistral (the name that code looks for never matches) and for base
    models. Llama-2 chat models get `[INST]`, as in LongBench's code.

    Raises
    ------
    UserError
        If the tokenizer's own template is wanted and it has none.
    """
    name = model_name.lower()
    if choice == "auto":
        if "llama-3" in name and "instruct" in name:
            choice = "model"
        elif ("llama-2" in name or "llama2" in name) and "chat" in name:
            choice = "llama2"
        elif "longchat" in name or "vicuna" in name:
            choice = "vicuna"
        else:
            choice = "none"
    if choice == "model" and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer of {model_name} has no chat template; pass --chat_template none")
    return choice


def with_chat_template(prompt: str, template: str, tokenizer) -> str:
    """Put the chat template around the prompt (`template` as `resolve_chat_template` returns it)."""
    if template == "none":
        return prompt
    if template == "llama2":
        return f"[INST]{prompt}[/INST]"
    if template == "vicuna":
        return _VICUNA.format(prompt=prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def print_unused(choice: str, template: str, tokenizer) -> None:
    """Say so where `auto` (`choice`) came to none (`template`) though the tokenizer has a template."""
    if choice == "auto" and template == "none" and getattr(tokenizer, "chat_template", None):
        print("note: the model has a chat template that is not used; --chat_template model uses it")
