# make demo    teach a tiny FLUX.1 that draws toys a dog, from five pictures, start to end, on the CPU
# make test    all tests, offline, on the CPU
# make quick   the tests of numbers, data and flags, within a minute: for who edits a script
# make faults  the long fault injection: 30 kills of each script, each resumed
# make gpu     on a machine with a GPU, without a network: what only a GPU shows, then five rows of the table of speeds
# make check   ruff, mypy, that the two scripts still share their text, and the sizes (tools/sizes.py)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/python -m accelerate.commands.launch --cpu --num_processes=1 --num_machines=1 --mixed_precision=no --dynamo_backend=no \
	--num_cpu_threads_per_process=$(CORES)

PYTEST := $(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder
QUICK := accumulation arguments buckets captions examples images optimizer pipeline_agreement shared_code step unchanged

# Ten minutes with the tests; for the other rows see benchmarks/results.md.
GPU_ROWS := "base, 512|bf16 base, compiled, 512|AdamW, 512"
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: demo test quick faults gpu check clean

demo: $(VENV)/installed
	@rm -rf demo
	$(BIN)/python -m benchmarks.small_world.draw demo/pictures --subject 0
	$(LAUNCH) train_dreambooth_lora_flux.py \
		--pretrained_model_name_or_path=benchmarks/small_world/checkpoint --instance_data_dir=demo/pictures \
		--caption_extension=.txt --prior_from_base_model --trigger_word="sks dog" --class_word="a dog" \
		--output_dir=demo/trained-lora \
		--resolution=64 --center_crop --train_batch_size=4 --repeats=4 --max_sequence_length=16 --guidance_scale=1 \
		--rank=16 --lora_alpha=16 --learning_rate=1e-3 @benchmarks/small_world/layers.txt --weighting_scheme=logit_normal \
		--max_train_steps=400 --checkpointing_steps=200 --validation_steps=100 --validation_epochs=1000 --num_validation_images=1 \
		--validation_prompt="a photo of sks dog in a room" --validation_prompt="a photo of sks dog at sunset" \
		--validation_prompt="a photo of sks dog on a street" --validation_prompt="a photo of sks dog at sea" \
		--validation_prompt="a photo of a dog" --seed=3
	@echo
	$(BIN)/python tools/contact_sheet.py demo/trained-lora --prompts "in a room" "at sunset" "on a street" "at sea" "a photo of a dog"
	@cd demo/trained-lora && ls -d pytorch_lora_weights.safetensors image_0.png validation checkpoint-200 checkpoint-400 logs >/dev/null
	@echo
	@echo "It works: demo/trained-lora/contact_sheet.jpg shows any dog in its first row, and in its last the dog of demo/pictures,"
	@echo "the first two columns in places where it was never photographed; the last column, \"a photo of a dog\", stays another dog."
	@echo "What a real run leaves behind lies in demo/trained-lora:"
	@echo "  LoRA weights         demo/trained-lora/pytorch_lora_weights.safetensors"
	@echo "  final pictures       demo/trained-lora/image_*.png"
	@echo "  pictures on the way  demo/trained-lora/validation/"
	@echo "  checkpoints          demo/trained-lora/checkpoint-200 and -400, for --resume_from_checkpoint=latest"
	@echo "  curves               $(BIN)/tensorboard --logdir demo/trained-lora/logs"
	@echo "Next: the same with FLUX.1 [dev] and your pictures, in README.md under 'In a hurry: a LoRA of your dog'."

test: $(VENV)/tools
	$(PYTEST)

quick: $(VENV)/tools
	$(PYTEST) $(QUICK:%=tests/test_%.py)

faults: $(VENV)/tools
	FLUX_FAULTS=30 $(BIN)/python -m pytest tests/test_faults.py

gpu:
	$(GPU_PYTHON) -m pytest tests/test_gpu.py $(shell $(GPU_PYTHON) -c "import xdist" 2>/dev/null && printf -- -n8)
	$(GPU_PYTHON) -m benchmarks.run --gpu_table --record --work gpu --steps=8 --only=$(GPU_ROWS)

check: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_shared_code.py
	$(BIN)/python -m tools.sizes

$(VENV)/installed: requirements_flux.txt
	test -x $(BIN)/python || $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python must be 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)')"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements_flux.txt
	@touch $@

$(VENV)/tools: $(VENV)/installed pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pytest~=9.2" "pytest-xdist~=3.8" "ruff~=0.17.6" "mypy~=2.4.1"
	@touch $@

clean:
	rm -rf demo $(VENV)
