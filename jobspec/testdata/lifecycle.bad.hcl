job "phases" {
  group "g" {
    task "early" {
      driver = "raw_exec"
      leader = true

      lifecycle {
        hook = "prestrat"
      }

      config {
        command = "/bin/true"
      }
    }

    task "late" {
      driver = "raw_exec"

      lifecycle {
        hook    = "poststop"
        sidecar = true
      }

      config {
        command = "/bin/true"
      }
    }
  }
}
