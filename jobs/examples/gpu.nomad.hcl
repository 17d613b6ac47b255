# Asks for one whole NVIDIA GPU with at least 8 GiB and shows what the task sees
# of it. On a node without one the job waits, and `nomad job status gpu` says why.
job "gpu" {
  type = "batch"

  group "gpu" {
    task "show" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo NVIDIA_VISIBLE_DEVICES=$NVIDIA_VISIBLE_DEVICES; nvidia-smi -L"]
      }

      resources {
        cpu    = 100
        memory = 128

        device "nvidia/gpu" {
          count = 1

          constraint {
            attribute = "${device.attr.memory}"
            operator  = ">="
            value     = "8 GiB"
          }
        }
      }
    }
  }
}
