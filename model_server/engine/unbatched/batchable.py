"""Decides whether a request can be batched. The fallback generates the others, one `model.generate` call at a time."""

from __future__ import annotations

from model_server.request import SamplingParams


def can_batch(params: SamplingParams) -> bool:
    """Return whether a request can share steps with other sequences."""
    return unbatchable_parameter(params) is None


def unbatchable_parameter(params: SamplingParams) -> str | None:
    """Return the name of the parameter that keeps a request from sharing steps with other sequences, or None.

    Beam search, guidance, token healing, generation without a cache and the `selfhash` watermark need
    more than the logits of the sequence's latest token.
    """
    given = {name: value for name, value in params.generate.items() if value is not None}
    needs_more = {
        "num_beams": params.num_choices > 1 or given.get("num_beams", 1) > 1,
        "guidance_scale": given.get("guidance_scale", 1) != 1,
        "negative_prompt_ids": "negative_prompt_ids" in given,
        "token_healing": given.get("token_healing", False),
        "use_cache": not given.get("use_cache", True),
        "watermarking_config": given.get("watermarking_config", {}).get("seeding_scheme") == "selfhash",
    }
    return next((name for name, needed in needs_more.items() if needed), None)
