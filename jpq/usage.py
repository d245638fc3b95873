"""What the command line says of itself: commands, examples, and what stands for a flag's value on a help page."""

from __future__ import annotations

COMMANDS = {
    "optimize": "Prune and quantize a model together, onto a budget.",
    "study": "Search a front of models, accuracy against cost, by many runs; any number of workers share it.",
    "prune-private": "Prune a trained model without any data; the mask is for jpq optimize --mask.",
    "inspect": "What jpq sees in a model: layers, channels that can go, parts that must stay, and costs.",
    "pareto": "Runs and studies as one front, as table and picture; and a point of it, by what it may cost.",
    "export": "Make a point final: ONNX and packed files, verified, and its accuracy on the test split.",
    "evaluate": "Accuracy of a model that an earlier run saved, or of an exported file in a runtime.",
    "bench": "Measure a model's layers into a table of latencies, or exported models against one.",
    "methods": "The methods, what each decides, and when to choose it.",
}
EXAMPLES = {
    "optimize": (
        "jpq optimize --target-bops 1%",
        "jpq optimize --model resnet20 --weights w.th --data cifar10 --target-bops 0.9%",
        "jpq optimize --target-bops 12M --target-size 50KB --method djpq-pow2",
        "jpq optimize --config runs/0123456789ab/config.toml --seed 1",
    ),
    "study": (
        "jpq study --trials 40",
        "jpq study --name r20 --model resnet20 --weights w.th --data cifar10 --epochs 3 --per block --sampler nsga2",
        "jpq study --name small --objectives accuracy,size --max-size 60KB",
        "jpq study --name shared --storage postgresql+psycopg://jpq@server/jpq",
        "jpq study --vary target,method,lr --methods djpq,l0,dhp --bops-range 0.25% 2%",
    ),
    "prune-private": (
        "jpq prune-private --model resnet20 --weights w.th --synthetic --out private",
        "jpq optimize --mask private --model resnet20 --weights w.th --data cifar10 --target-bops 0.5%",
    ),
    "inspect": (
        "jpq inspect --model lenet5 --data fashion-mnist",
        "jpq inspect --model torchvision:densenet121 --all",
        "jpq inspect --model torchvision:r3d_18 --input-shape 3 16 112 112",
    ),
    "pareto": (
        "jpq pareto runs",
        "jpq pareto runs/0123456789ab studies/digits --costs size --all",
        "jpq pareto runs --min-accuracy 97% --max-size 20KB",
        "jpq pareto runs --knee --out figures",
    ),
    "export": (
        "jpq export runs/0123456789ab",
        "jpq export studies/digits --max-bops 0.5%",
        "jpq export runs --knee --out final",
    ),
    "evaluate": (
        "jpq evaluate runs/0123456789ab",
        "jpq evaluate runs/0123456789ab/model.onnx --runtime onnxruntime,openvino",
        "jpq evaluate model.onnx --data cifar10",
    ),
    "bench": (
        "jpq bench --table convnet.csv --model convnet",
        "jpq bench --table resnet20.csv --model resnet20 --data cifar10 --threads 2",
        "jpq bench runs/0123456789ab --threads 1 2 --runtime onnxruntime,openvino",
        "jpq bench runs/0123456789ab --table resnet20.csv",
        "jpq bench runs/0123456789ab/model.onnx other.onnx",
    ),
    "methods": ("jpq methods",),
}
METAVARS = {
    name: shown
    for shown, names in {
        "COST": "target_bops target_macs max_bops max_macs",
        "SIZE": "target_size max_size",
        "TIME": "target_latency max_latency",
        "MIN MAX": "w_bits a_bits density_range bops_range lr_range",
        "DECISIONS": "bits densities",
        "NAMES": "objectives vary methods structures",
        "URL": "storage",
        "SHARE": "density min_accuracy",
        "[COST ...]": "costs",
        "INT": "limit tune_epochs channel_multiple",
        "CLASSES": "classes",
        "C H W": "input_shape",
        "[LAYER ...]": "skip",
        "FILE": "weights config mask latency_table table",
        "FOLDER": "data_root out",
        "[RUN_FOLDER|FILE.onnx ...]": "what",
        "RUN_FOLDER|FILE.onnx": "saved",
        "RUNS ...": "runs",
        "NAME": "method score schedule allocator structure width model data device cost like proxy inputs "
        "name sampler per",
    }.items()
    for name in names.split()
}
