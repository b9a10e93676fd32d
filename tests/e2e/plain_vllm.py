"""Runs in a process of its own, with vLLM and without ctrlray: loads an exported folder, turns its dial, samples 10k tokens."""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams

folder, asked = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(folder, dtype=asked["dtype"], max_model_len=512, block_size=32, max_num_seqs=128, enforce_eager=True)
turns = [{"role": "user", "content": "Tell me <|safety:1|> about tea."}]
prompts = {}
for levels in asked["levels"]:
    (out,) = llm.chat(turns, SamplingParams(max_tokens=1), chat_template_kwargs=levels, use_tqdm=False)
    prompts[json.dumps(levels)] = list(out.prompt_token_ids)
try:
    llm.chat(turns, SamplingParams(max_tokens=1), chat_template_kwargs={"safety": 9}, use_tqdm=False)
    refused = ""
except Exception as error:
    refused = str(error)
chats = [[{"role": "user", "content": f"Write a short story about the number {i}."}] for i in range(160)]
params = SamplingParams(max_tokens=72, temperature=1.0, ignore_eos=True)
sampled = [t for o in llm.chat(chats, params, use_tqdm=False) for t in o.outputs[0].token_ids]
assert not [m for m in sys.modules if m.startswith("ctrlray")]
print("RESULT " + json.dumps({"prompts": prompts, "refused": refused, "sampled": sampled}))
