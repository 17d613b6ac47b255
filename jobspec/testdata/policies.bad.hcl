job "policies" {
  update {
    max_parallel     = 0
    auto_revert      = true
    auto_promote     = true
    health_check     = "cheks"
    min_healthy_time = "10m"
    healthy_deadline = "5m"
    stagger          = "0s"
  }

  migrate {
    max_parallel = -1
    health_check = "manual"
  }

  group "g" {
    scaling {
      min  = 2
      max  = 1
    }

    shutdown_delay = "-1s"

    restart {
      attempts = 10
      interval = "1m"
      delay    = "15s"
      mode     = "fial"
    }

    reschedule {
      attempts       = 3
      delay          = "1s"
      delay_function = "linear"
    }

    ephemeral_disk {
      size = 5
    }

    task "t" {
      driver         = "raw_exec"
      kill_timeout   = "-5s"
      kill_signal    = "SIGTRM"
      shutdown_delay = "-1ms"
      leader         = true

      config {
        command = "/bin/true"
      }

      restart {
        attempts = 0
        interval = "1s"
        mode     = "delay"
      }

      logs {
        max_files     = 0
        max_file_size = 0
      }
    }

    task "u" {
      driver = "raw_exec"
      leader = true
      config {
        command = "/bin/true"
      }
    }
  }

  group "h" {
    scaling {
      min = 2
      max = 3
    }
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
    }
  }
}
