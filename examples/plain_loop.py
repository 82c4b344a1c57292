"""Train an adapter in a plain PyTorch loop: python examples/plain_loop.py"""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import deltalens as dl
from deltalens.data import ArrayDataset, eval_transform
from deltalens.data.digits import load_digits


def main(output: str = "runs/digits-mona", epochs: int = 5, train_images: int = 1000) -> float:
    model = dl.create_backbone("deltalens/vit-mini", num_classes=10)  # or any timm.create_model(...)
    dl.attach(model, dl.MonaConfig(bottleneck=32))  # in place: freezes the backbone, inserts the adapter
    dl.print_trainable_parameters(model)

    digits = load_digits(size=48, train_images=train_images)
    transform = eval_transform(dl.preprocessing(model))  # resize and normalise as the backbone expects
    train = DataLoader(ArrayDataset(digits.train.images, digits.train.labels, transform), 32, shuffle=True)
    test = DataLoader(ArrayDataset(digits.test.images, digits.test.labels, transform), 100)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * len(train))
    for epoch in range(epochs):
        model.train()  # frozen modules stay as the method wants them
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
        accuracy = correct / len(digits.test)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")

    dl.adapter_info(model).update(class_names=list(digits.class_names), metrics={"test accuracy": accuracy})
    dl.save_pretrained(model, output)  # the adapter only; dl.from_pretrained(output) rebuilds everything
    return accuracy


if __name__ == "__main__":
    main()
