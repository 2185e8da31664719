#!/usr/bin/env bash
# The main job from end to end, on CPU: `make quickstart` runs it in the virtual environment. Every command is shown.
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=recipes/jargon/recipe.yaml
adapter=out/jargon

title() { printf '\n\n# %s\n' "$*"; }

run() {
  local word line='$'
  for word in "$@"; do
    line+=" $(printf '%q' "$word")"
  done
  printf '\n%s\n\n' "$line"
  "$@"
}

title 'A real model: SmolLM2-135M-Instruct'
run python scripts/smollm2.py

title 'What the adapter trains, and what that costs'
run lora params "$recipe"

title 'Training on the Jargon File'
run lora train "$recipe" --overwrite

title 'The held-out rows, by base and by base + adapter'
run lora eval "$recipe"

title 'The same prompts, answered by both'
ask=$'Explain this piece of hacker slang.\n\n'
run lora generate --adapter "$adapter" --max-new-tokens 48 \
  --prompt "${ask}computer" --prompt "${ask}politician" --prompt "${ask}deadline"

title 'One model of base and adapter, with proof'
run lora merge --adapter "$adapter"

cat <<TXT


# Next

The adapter is in $adapter, in PEFT's format; the merged model is in $adapter/merged.
\`source ${VENV:-.venv}/bin/activate\` brings \`lora\` into this shell. Then, for instance:

  lora generate --adapter $adapter --prompt 'What is a kludge?'     your own prompts
  lora train $recipe --set lora.r=32 --out out/r32     another rank
  lora train $recipe --dry-run     every value, and where it comes from
  lora params --model Qwen3-8B --r 16 --targets qkvo     the budget of a larger model

Recipes for larger models are in configs/, and docs/recipe.md explains every key.
TXT
