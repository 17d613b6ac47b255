job "spot" {
  type = "batch"

  meta {
    rx_spot = "alow"
  }

  group "g" {
    meta {
      rx_spot = "require"
    }

    task "t" {
      driver = "raw_exec"

      config {
        command = "true"
      }

      meta {
        rx_spot = "allow"
      }
    }
  }
}
