# One command per line, each a thing a person could type. Run `make` for the list.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
FORMAT ?= both
METHOD ?= densecl
SIZE   ?= 256
QUALITY ?= 90
TASKS  ?= knn,segment
TO     ?= timm
SRC    ?=
SPLIT  ?=
RUN    ?=
RUNS   ?=
GPUS   ?=
KIND   ?= crops
KERNEL ?=
JOBS   ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup shards verify preview pretrain eval export visualise report compare doctor chaos fuzz bench bench-step bench-data test lint

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  docs/first-hour.md goes through them; docs/README.md lists all pages."

setup: ## the environment, once: venv, pinned packages, FFCV's libraries   [SETUP=minimal PYTHON=python3.12]
	@$(PYTHON) dense_ssl/install.py --venv $(VENV) $(if $(filter minimal,$(SETUP)),--minimal)

shards: setup ## convert images to FFCV / DALI shards   DATASET=coco|imagenet|folder|scenes SRC= OUT= [SPLIT= FORMAT=ffcv|dali|both SIZE=256 QUALITY=90 WORKERS= ARGS=]
	@$(PY) -m dataprep $(DATASET) $(if $(SRC),--src "$(SRC)") $(if $(SPLIT),--split $(SPLIT)) --out "$(OUT)" --format $(FORMAT) --size $(SIZE) --quality $(QUALITY) $(if $(WORKERS),--workers $(WORKERS)) $(ARGS)

verify: setup ## re-check a shard set against its manifest   DATA=shards/coco
	@$(PY) -m dataprep verify "$(DATA)" $(ARGS)

preview: setup ## what a method will see of some data, before any training   METHOD=densecl DATA=shards/coco [OUT=preview.html ARGS="--images 8"]
	@$(PY) -m dense_ssl.preview $(METHOD) --data "$(DATA)" $(if $(OUT),--out "$(OUT)") $(ARGS)

pretrain: setup ## pre-train, or resume the same RUN   METHOD=densecl [DATA= RUN= GPUS= SCENES=2000 EVAL=knn,linear EVAL_DATA= EVAL_ARGS= ARGS="optim.lr=0.3"]
	@$(PY) -m dense_ssl.start $(METHOD) $(if $(DATA),--data "$(DATA)") $(if $(RUN),--run "$(RUN)") $(if $(GPUS),--gpus $(GPUS)) $(if $(SCENES),--scenes $(SCENES)) $(if $(EVAL),--eval $(EVAL)) $(if $(EVAL_DATA),--eval-data "$(EVAL_DATA)") $(if $(EVAL_ARGS),--eval-args "$(EVAL_ARGS)") $(ARGS)

eval: setup ## evaluate a run, a checkpoint or timm:NAME   RUN=runs/a DATA= [TASKS=knn,segment ARGS=]
	@$(PY) -m dense_ssl.evaluation $(TASKS) --checkpoint "$(RUN)" --data "$(DATA)" $(ARGS)

export: setup ## backbone weights for other libraries   RUN=runs/a [TO=timm,torchvision,detectron2,huggingface,onnx,official|all OUT=]
	@$(PY) -m dense_ssl.export --run "$(RUN)" --to $(TO) $(if $(OUT),--out "$(OUT)") $(ARGS)

visualise: setup ## a picture of what the run sees   RUN=runs/a [KIND=crops|masks|correspondence|attention|pca|neighbours|queue|places OUT=]
	@$(PY) -m dense_ssl.visualise --run "$(RUN)" --kind $(KIND) $(if $(OUT),--out "$(OUT)") $(ARGS)

report: setup ## one self-contained HTML page about a run   RUN=runs/a
	@$(PY) -m dense_ssl.report "$(RUN)"

compare: setup ## does a run look right; runs beside one another in one page   RUNS=runs/a[,runs/b] [OUT=compare.html ARGS="--reference runs/right"]
	@$(PY) -m dense_ssl.compare "$(RUNS)" $(if $(OUT),--out "$(OUT)") $(ARGS)

doctor: setup ## what this machine has, whether it works, what a run would need   [METHOD=densecl DATA= RUN= GPUS=]
	@$(PY) -m dense_ssl.doctor $(if $(filter-out file,$(origin METHOD)),$(METHOD)) $(if $(DATA),--data "$(DATA)") $(if $(RUN),--run "$(RUN)") $(if $(GPUS),--gpus $(GPUS)) $(ARGS); code=$$?; [ $$code -ne 2 ]

chaos: setup ## faults of a run tried one by one: does it end with the same weights, or say why not   [ARGS="--loaders ffcv --only sigterm"]
	@$(PY) -m dense_ssl.chaos $(ARGS)

fuzz: setup ## damaged and hostile files for every reader: does it crash, hang, fill the memory   [ARGS="--minutes 10 --only coco,zip"]
	@$(PY) -m dense_ssl.fuzz $(ARGS)

bench: setup $(VENV)/bench.stamp ## every kernel beside torch, torch.compile and public rivals   [KERNEL=queue_info_nce ARGS=--write-results]
	@TORCH_CPP_LOG_LEVEL=ERROR $(PY) -m kernels.bench $(KERNEL) $(ARGS)

# The rivals come without their dependencies: they run on the torch and triton that are there. Where there
# is no network, what is missing is listed in the table.
$(VENV)/bench.stamp: constraints.txt | setup
	@echo "bench: installing liger-kernel, cut-cross-entropy, matplotlib ..."
	@if $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps liger-kernel cut-cross-entropy \
	  && $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt matplotlib; then touch $@; fi

bench-step: setup ## a training step beside the published sequence of operations   METHOD=ibot [ARGS="--batch 16 train.precision=bf16"]
	@$(PY) -m dense_ssl.bench_step $(METHOD) $(ARGS)

bench-data: setup ## images/s of every loader beside the peers' way   DATA=shards/coco [ARGS=]
	@$(PY) -m dense_ssl.bench_data --data "$(DATA)" $(ARGS)

lint: setup ## style, types, import rules, spelling
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/basedpyright --pythonpath $(PY)
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/codespell dataprep dense_ssl kernels configs tests docs README.md Makefile

# Each test keeps to one thread, so as many run side by side as there are cores (eight at most: each holds about 2 GB).
PARALLEL = -n $(JOBS) --maxprocesses 8 --dist worksteal
# What runs kernels; of the benchmarks, which run none, the refusal to time the interpreter.
INTERPRETED = $(addprefix tests/test_,kernels.py kernel_multicrop.py kernel_photometric.py kernel_training.py decoded.py kernel_bench.py::test_refuses_to_time_the_interpreter)

test: lint ## lint, types, import rules, all tests   [JOBS=1 ARGS="-k resume"]
	@$(PY) -m pytest -q $(PARALLEL) $(ARGS)
	@echo "the kernels once more, in Triton's interpreter:"
	@TRITON_INTERPRET=1 DENSE_SSL_KERNELS=triton OMP_NUM_THREADS=1 $(PY) -m pytest -q $(PARALLEL) $(INTERPRETED) $(ARGS) || [ $$? -eq 5 ]  # 5: ARGS chose none of them
