"""The quick start: remove five layers of SmolLM2-135M-Instruct, measure, save and load again.

    python examples/fit.py

README.md holds this program without these lines.
"""

from transformers import AutoModelForCausalLM

import ghosted_fast as gf

demo = gf.fetch_demo_assets()  # a model and two texts, 140 MB the first time
model, tokenizer = gf.load_model(demo.model)
calibration = gf.token_batches(tokenizer, gf.load_texts(demo.calibration), num_tokens=16384)
evaluation = gf.token_batches(tokenizer, gf.load_texts(demo.evaluation), num_tokens=5120)

smaller, report = gf.ghost_model(model, calibration, remove=5)
print(f"removed layers {report.removed[0]}-{report.removed[-1]}")

pruned = gf.prune_model(model, report.removed)
for name, variant in {"dense": model, "pruned": pruned, "ghosted": smaller}.items():
    print(f"{name:8} perplexity {gf.perplexity(variant, evaluation).value:.2f}")

gf.save_model(smaller, "smaller", tokenizer, overwrite=True)
again = AutoModelForCausalLM.from_pretrained("smaller")
prompt = tokenizer("The capital of France is", return_tensors="pt")
written = again.generate(**prompt, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
