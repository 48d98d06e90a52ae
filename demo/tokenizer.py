"""The demo model's tokenizer and chat template, in the form of Mistral 7B Instruct v0.3's."""

from __future__ import annotations

import json
import re

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from . import weather
from .corpus import Entry

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
VOCAB_SIZE = 2048
MAX_POSITIONS = 8192

CONTROL_TOKENS = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)

# The form of Instruct v0.3: the system prompt and the tools stand at the last message of the user. The tokenizer puts a
# space before the text behind a control token.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] + '\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- if not turns -%}
  {{- raise_exception('After the system message there must be one from the user.') -}}
{%- endif -%}
{%- set last = namespace(user=-1, role='start') -%}
{%- for message in turns if message['role'] == 'user' -%}
  {%- set last.user = loop.index0 -%}
{%- endfor -%}
{%- set users = namespace(count=-1) -%}
{{- bos_token -}}
{%- for message in turns -%}
  {%- set after = {'start': 'user', 'user': 'assistant', 'assistant': 'user tool', 'tool': 'assistant tool'} -%}
  {%- if message['role'] not in after[last.role].split() -%}
    {{- raise_exception('Roles must alternate, user first, after at most one system message.') -}}
  {%- endif -%}
  {%- set last.role = message['role'] -%}
  {%- if message['role'] == 'user' -%}
    {%- set users.count = users.count + 1 -%}
    {%- if users.count == last.user and tools -%}
      {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {{- '[INST]' + (system if users.count == last.user else '') + message['content'] + '[/INST]' -}}
  {%- elif message['role'] == 'tool' -%}
    {%- set result = {'content': message['content'], 'call_id': message['tool_call_id']} -%}
    {{- '[TOOL_RESULTS]' + result | tojson + '[/TOOL_RESULTS]' -}}
  {%- else -%}
    {{- message['content'] -}}
    {%- if message['tool_calls'] -%}
      {{- '[TOOL_CALLS][' -}}
      {%- for call in message['tool_calls'] -%}
        {%- set written = {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} -%}
        {{- written | tojson + ('' if loop.last else ', ') -}}
      {%- endfor -%}
      {{- ']' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""


def learned_tokenizer(known: list[Entry]) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer in Mistral 7B's own form: bytes as fallback, words that carry their space."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 256, initial_alphabet=[chr(c) for c in range(33, 127)], show_progress=False
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(True)])
    texts = [text for entry in known for text in (*entry.questions, entry.answer)]
    texts += [json.dumps([weather.TOOL]), *(weather.written_call(city) for city in weather.CITIES)] * 3
    without_emoji = (re.sub("[\u2000-\u2fff\U00010000-\U0010ffff]", "", text) for text in texts)  # so: bytes
    learner.train_from_iterator(without_emoji, trainer)
    learned_ids = learner.get_vocab()
    learned = sorted(learned_ids, key=learned_ids.__getitem__)
    vocab = [UNK, BOS, EOS, *CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    merges = [(left, right) for left, right in json.loads(learner.model.__getstate__())["merges"]]

    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocab)},
            merges,
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (UNK, BOS, EOS, *CONTROL_TOKENS)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
