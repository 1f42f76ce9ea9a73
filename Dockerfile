# docker build -t yolov7 . && docker run --rm yolov7            detects on four sample images
# docker run --rm --gpus all -v "$PWD:/home/user/here" yolov7 predict --weights ...
FROM python:3.12-slim

# Triton compiles its launchers with a C compiler, when a GPU is first used; OpenCV loads the others.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev libgl1 libglib2.0-0 \
 && rm -rf /var/lib/apt/lists/*

# For a CPU alone: --build-arg INDEX=... with PyTorch's index of CPU builds, gigabytes less.
ARG INDEX=
WORKDIR /yolov7
COPY . .
RUN pip install --no-cache-dir ${INDEX:+--extra-index-url "$INDEX"} -c constraints.txt .

RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["yolov7"]
CMD ["predict"]
