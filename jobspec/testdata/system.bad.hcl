job "everywhere" {
  type        = "system"
  all_at_once = true

  affinity {
    attribute = "${node.class}"
    value     = "big"
  }

  update {
    max_parallel = -1
    stagger      = "0s"
  }

  migrate {
    max_parallel = 2
  }

  periodic {
    cron = "@daily"
  }

  group "g" {
    count = 2

    reschedule {
      attempts = 1
    }

    spread {
      attribute = "${node.datacenter}"
    }

    task "t" {
      driver = "raw_exec"

      affinity {
        attribute = "${node.class}"
        value     = "small"
      }

      config {
        command = "/bin/true"
      }
    }
  }
}
