job "children" {
  type = "service"

  periodic {
    cron      = "@hourly"
    crons     = ["61 * * * *", "0 0 31 2 *", "*/5 * * * *", "soon"]
    time_zone = "Mars/Olympus"
  }

  parameterized {
    payload       = "maybe"
    meta_required = ["who", "rx_queue", ""]
    meta_optional = ["who"]
  }

  group "g" {
    task "t" {
      driver = "raw_exec"

      config {
        command = "/bin/true"
      }

      dispatch_payload {
        file = "../out"
      }
    }

    task "u" {
      driver = "raw_exec"

      config {
        command = "/bin/true"
      }

      dispatch_payload {}
    }
  }
}
