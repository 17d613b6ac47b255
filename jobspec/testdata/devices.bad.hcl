job "devices" {
  group "g" {
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
      resources {
        cpu    = 0
        memory = 1
        device "nvidia/gup" {}
        device "nvidia/gpu-milli" {
          count = 250
        }
        device "nvidia/gpu-mib" {
          count = 8192
        }
        device "nvidia/mig-1g.10gb" {}
        device "amd/gpu" {}
        device "nvidia/gpu/Tesla T4" {
          count = 0
        }
        device "gpu" {
          count = 5000
          constraint {
            attribute = "${device.atr.memory}"
            operator  = ">="
            value     = "8 GiB"
          }
          constraint {
            distinct_hosts = true
          }
        }
      }
    }
  }
}
