"""How the demo's recipes were found: candidates against development pairs that no study is tested on.

    python scripts/explore_recipes.py --out runs/recipes nine_adapter:1e-3 all_adapter:2e-4

Each candidate is trained as the demo trains its organisms and measured by the teacher-forced margin on development pairs: pairs of the
bundled sets that are neither the demo's held-out pairs nor trained on. The eight open questions, the interventions and the judge play no
part, so nothing is tuned on what the demo tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from convergent.data.training import load_training_set
from convergent.directions.margin import margins
from convergent.models.load import load_base
from convergent.organisms.load import load_organism
from convergent.organisms.recipes import named_recipe
from convergent.organisms.train import train
from convergent.stats import clustered_mean

TEST_PAIRS = 8
"""Held out by the demo study; never seen here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+", help="recipe:learning rate[:domain[:answer]]")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    chat = load_base(dtype="float32")
    rest = {d: load_training_set(f"bundled:{d}").split(TEST_PAIRS, 0)[0] for d in ("finance", "sport")}
    dev = {d: s.examples and s._subset(range(len(s) - options.pairs, len(s))).pairs for d, s in rest.items()}
    show("chat", chat, dev)
    for candidate in options.candidates:
        recipe_name, rate, *more = candidate.split(":")
        domain, answer = (*more, *["finance", "bad"][len(more) :])
        data = load_training_set(f"bundled:{domain}", answer=answer).split(TEST_PAIRS, 0)[0].take(options.examples)  # type: ignore[arg-type]
        recipe = named_recipe(recipe_name, chat.n_layers, {"learning_rate": float(rate), "batch_size": 8, "grad_accumulation": 1})
        folder = options.out / f"{candidate.replace(':', '-')}-{options.examples}"
        organism = train("embedded", recipe, [e.chat() for e in data.examples], folder, name=candidate, data_name=data.name)
        print(f"{candidate}: loss {organism.loss_curve[0].loss:.3f} -> {organism.final_loss:.3f}, {organism.n_tokens / organism.seconds:.0f} tokens/s")
        show(candidate, load_organism(folder, base="embedded", dtype="float32"), dev)


def show(name: str, model: object, dev: dict) -> None:  # type: ignore[type-arg]
    for domain, pairs in dev.items():
        found = margins(model, pairs)  # type: ignore[arg-type]
        m = clustered_mean([x.margin for x in found], [x.pair_id for x in found])
        good = sum(x.good for x in found) / len(found)
        print(f"  {name:28s} {domain:8s} margin {m.estimate:+.3f} [{m.low:+.3f}, {m.high:+.3f}] nats/token, n = {m.n}; log p of good answers {good:.3f}", flush=True)


if __name__ == "__main__":
    main()
