"""A test.py such as the course's graders run: retrieval on camera scenes by a handed-in model.

Written from CONTRACT.md alone. Run in a folder that holds the handed-in model.py, this file,
`netvlad_final.pth` and `dataset/camera`. Prints the best match of each query.
"""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from model import NetVLADModel


class IndoorDataset(Dataset):
    def __init__(self, base_dir, transform, scenes):
        self.transform = transform
        self.items = []
        for scene in scenes:
            poses = np.loadtxt(f"{base_dir}/{scene}/pose.txt", dtype=np.float32)
            for i, pose in enumerate(poses):
                self.items.append((f"{base_dir}/{scene}/images/{i:06d}_left.png", pose, scene, i))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, k):
        path, pose, scene, i = self.items[k]
        return self.transform(Image.open(path).convert("RGB")), pose, path, scene, i


def main():
    device = torch.device("cpu")
    transform = transforms.Compose(
        [
            transforms.Resize((64, 64)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    model = NetVLADModel(num_clusters=16).to(device)
    model.load_state_dict(torch.load("netvlad_final.pth", map_location=device))
    model.eval()
    dataset = IndoorDataset("dataset/camera", transform, ["P001", "P002"])
    embeddings, paths = [], []
    with torch.no_grad():
        for image, _, path, _, _ in DataLoader(dataset, batch_size=4):
            embeddings.append(model(image.to(device)).cpu().numpy())
            paths.extend(path)
    embeddings = np.concatenate(embeddings)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(42)).tolist()
    n_query = max(1, int(0.2 * len(dataset)))
    for q in order[:n_query]:
        distance = np.linalg.norm(embeddings[order[n_query:]] - embeddings[q], axis=1)
        print(f"Query: {paths[q]}")
        print(f"Best Match: {paths[order[n_query:][int(distance.argmin())]]}")
        print(f"Embed Dist: {distance.min():.4f}")


if __name__ == "__main__":
    main()
