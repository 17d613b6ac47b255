job "preferences" {
  affinity {
    attribute = "${atr.cpu.arch}"
    value     = "amd64"
    weight    = 0
  }

  affinity {
    operator = "like"
    value    = "x"
    weight   = -101
  }

  affinity {
    attribute = "${meta.rack}"
    operator  = "distinct_property"
  }

  spread {
    weight = 101
  }

  spread {
    attribute = "rack"
    weight    = -1
  }

  group "g" {
    affinity {
      attribute = "${attr.os.version}"
      version   = "new"
    }

    spread {
      attribute = "${meta.rack}"
      target "r1" {
        percent = 60
      }
      target "r2" {
        percent = 40
      }
      target "r1" {
        percent = 1
      }
      target "" {
        percent = 101
      }
    }

    spread {
      attribute = "${meta.rack}"
    }

    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
      affinity {
        attribute = "${device.model}"
        regexp    = "("
      }
      resources {
        device "nvidia/gpu" {
          affinity {
            attribute = "${device.model}"
          }
        }
      }
    }
  }
}
