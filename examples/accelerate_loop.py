"""Train an adapter with Accelerate: accelerate launch examples/accelerate_loop.py"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import deltalens as dl
from deltalens.data import ArrayDataset, eval_transform
from deltalens.data.digits import load_digits


def main(output: str = "runs/digits-lora", epochs: int = 5, train_images: int = 1000) -> float:
    accelerator = Accelerator()
    set_seed(0)  # the same initial adapter and head in every process
    model = dl.create_backbone("deltalens/vit-mini", num_classes=10)
    dl.attach(model, dl.LoRAConfig(r=8, parts=("q", "v")))  # attach before prepare

    digits = load_digits(size=48, train_images=train_images)
    transform = eval_transform(dl.preprocessing(model))
    train = DataLoader(ArrayDataset(digits.train.images, digits.train.labels, transform), 32, shuffle=True)
    test = DataLoader(ArrayDataset(digits.test.images, digits.test.labels, transform), 100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=1e-4)
    wrapped, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)

    for epoch in range(epochs):
        wrapped.train()
        for images, labels in train:
            loss = F.cross_entropy(wrapped(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        wrapped.eval()
        correct = seen = 0
        for images, labels in test:
            with torch.inference_mode():
                predicted = wrapped(images).argmax(1)
            predicted, labels = accelerator.gather_for_metrics((predicted, labels))
            correct, seen = correct + int((predicted == labels).sum()), seen + len(labels)
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {correct / seen:.1%}")

    model = accelerator.unwrap_model(wrapped)
    dl.adapter_info(model)["class_names"] = list(digits.class_names)
    if accelerator.is_main_process:
        dl.save_pretrained(model, output)
    return correct / seen


if __name__ == "__main__":
    main()
