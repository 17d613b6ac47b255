# Four tasks on one NVIDIA GPU: each asks for a quarter of its time and 2 GiB of its
# memory. The share is counted when work is placed. The GPU itself holds a task to it
# only where the host runs NVIDIA's Multi-Process Service.
job "share" {
  type = "batch"

  group "share" {
    count = 4

    task "show" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo GPU $CUDA_VISIBLE_DEVICES, $RX_GPU_MILLI thousandths, $RX_GPU_MIB MiB"]
      }

      resources {
        cpu    = 100
        memory = 128

        device "nvidia/gpu-milli" {
          count = 250
        }

        device "nvidia/gpu-mib" {
          count = 2048
        }
      }
    }
  }
}
