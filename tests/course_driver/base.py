"""A base.py such as the course's graders run over a handed-in model.py, train.py and eval.py.

Written from CONTRACT.md alone. Run in a folder that holds those three files, this one and
`dataset/`. It trains, measures recall and writes what it saw to `driver_facts.json` and
`driver_arrays.npz`, where the tests read it.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision import transforms

from eval import compute_embeddings, evaluate_recall
from model import NetVLADModel
from train import train, validate

IMAGE_SIZE_PX = 64  # the course's is 224; the trunk is fully convolutional and this is quicker
EPOCHS = 2
NO_STEP_LR = 1e-12


class LoadDataset(Dataset):
    """(q, p, n) triplets; p and n depend on the item alone, so that losses can be compared."""

    def __init__(self, query_file, db_file, gt_npz, transform):
        self.queries = Path(query_file).read_text().split()
        self.database = Path(db_file).read_text().split()
        gt = np.load(gt_npz)
        self.utm_q, self.utm_db = gt["utmQ"], gt["utmDb"]
        self.pos_dist_thr = gt["posDistThr"]
        self.transform = transform

    def __len__(self):
        return len(self.queries)

    def __getitem__(self, i):
        rng = random.Random(i)
        distance = np.linalg.norm(self.utm_db - self.utm_q[i], axis=1)
        positive = rng.choice(np.flatnonzero(distance < self.pos_dist_thr).tolist())
        negative = rng.choice(np.flatnonzero(distance > 10 * self.pos_dist_thr).tolist())
        paths = (self.queries[i], self.database[positive], self.database[negative])
        return tuple(self.transform(Image.open(path).convert("RGB")) for path in paths)


class ImageListDataset(Dataset):
    def __init__(self, list_file, transform):
        self.paths = Path(list_file).read_text().split()
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]).convert("RGB")), i, self.paths[i]


def parameters_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_change(before, after):
    return max((after[name].double() - before[name].double()).abs().max().item() for name in before)


def layer_change(before, after, size):
    """Largest change among the NetVLAD layer's tensors, told by their number of elements."""
    names = [name for name in before if before[name].numel() == size]
    return [(after[name] - before[name]).abs().max().item() for name in names]


def main():
    torch.manual_seed(0)
    device = torch.device("cpu")
    transform = transforms.Compose(
        [
            transforms.Resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    facts = {"epochs": EPOCHS}

    triplets = LoadDataset(
        "dataset/query_train.txt",
        "dataset/index_train.txt",
        "dataset/gt/pitts30k_train.npz",
        transform,
    )
    n_train, n_val = int(0.8 * len(triplets)), int(0.1 * len(triplets))
    train_set, val_set, test_set = random_split(
        triplets, [n_train, n_val, len(triplets) - n_train - n_val]
    )
    # Eight training items in batches of 3: the last batch is short; the other loaders hold one.
    train_loader = DataLoader(train_set, batch_size=3, shuffle=True)
    val_loader = DataLoader(val_set, batch_size=3)
    test_loader = DataLoader(test_set, batch_size=3)

    model = NetVLADModel(num_clusters=16).to(device)
    fresh = parameters_of(model)
    print("== train ==", flush=True)
    train(model, train_loader, val_loader, device, epochs=EPOCHS, lr=1e-4)
    print("== trained ==", flush=True)
    facts["layer_change"] = layer_change(fresh, parameters_of(model), 16 * 512)
    facts["steps"] = EPOCHS * len(train_loader)
    trained = parameters_of(model)

    val_loss, test_loss = (
        validate(model, val_loader, device),
        validate(model, test_loader, device),
    )
    facts["val_loss"], facts["test_loss"] = val_loss, test_loss
    facts["loss_types"] = [type(val_loss).__name__, type(test_loss).__name__]
    facts["validate_changed"] = largest_change(trained, parameters_of(model))

    torch.save(model.state_dict(), "netvlad_final.pth")

    query_ds = ImageListDataset("dataset/query_val.txt", transform)
    db_ds = ImageListDataset("dataset/index_val.txt", transform)
    gt = np.load("dataset/gt/pitts30k_val.npz")
    print("== recall ==", flush=True)
    recall = evaluate_recall(
        model, query_ds, db_ds, gt["utmQ"], gt["utmDb"], gt["posDistThr"], device
    )
    print("== recall of all ==", flush=True)
    recall_of_all = evaluate_recall(
        model,
        query_ds,
        db_ds,
        gt["utmQ"],
        gt["utmDb"],
        float(gt["posDistThr"]),
        device,
        recall_values=[2, len(db_ds)],
    )
    print("== recalled ==", flush=True)
    facts["recall"] = {str(k): int(v) for k, v in recall.items()}
    facts["recall_of_all"] = {str(k): int(v) for k, v in recall_of_all.items()}

    query_emb, query_indices, query_paths = compute_embeddings(model, query_ds, device)
    db_emb, db_indices, db_paths = compute_embeddings(model, db_ds, device, batch_size=5)
    db_emb_32, _, _ = compute_embeddings(model, db_ds, device, batch_size=32)
    facts["embedding_types"] = [type(query_emb).__name__, str(query_emb.dtype)]
    facts["query_indices"] = [int(i) for i in query_indices]
    facts["db_indices"] = [int(i) for i in db_indices]
    facts["query_paths"], facts["db_paths"] = list(query_paths), list(db_paths)

    model.eval()
    with torch.no_grad():
        forward_db = model(torch.stack([db_ds[i][0] for i in range(len(db_ds))])).numpy()
        facts["forward_dtype"] = str(forward_db.dtype)
        shapes = [model(torch.randn(2, 3, h, w)).shape for h, w in ((224, 224), (96, 128))]
        facts["forward_shapes"] = [list(shape) for shape in shapes]

    # The state dict in a bare module, which is then trained on: neither may initialize again.
    bare = NetVLADModel(num_clusters=16)
    bare.load_state_dict(torch.load("netvlad_final.pth", map_location=device))
    bare.eval()
    with torch.no_grad():
        bare_db = bare(torch.stack([db_ds[i][0] for i in range(len(db_ds))])).numpy()
    train(bare, val_loader, test_loader, device, epochs=1, lr=NO_STEP_LR)
    facts["loaded_then_trained_change"] = largest_change(trained, parameters_of(bare))
    train(model, val_loader, test_loader, device, epochs=1, lr=NO_STEP_LR)
    facts["trained_again_change"] = largest_change(trained, parameters_of(model))

    np.savez(
        "driver_arrays.npz",
        query_emb=query_emb,
        db_emb=db_emb,
        db_emb_32=db_emb_32,
        forward_db=forward_db,
        bare_db=bare_db,
    )
    Path("driver_facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
