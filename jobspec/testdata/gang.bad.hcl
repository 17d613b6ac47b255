job "gang" {
  type        = "batch"
  all_at_once = true

  group "big" {
    count = 600
    meta {
      rx_gang              = "yes please"
      rx_topology_required = "true"
    }
    task "t" {
      driver = "raw_exec"
      config { command = "/bin/true" }
    }
  }

  group "rack" {
    count = 600
    meta {
      rx_gang           = "true"
      rx_topology       = "node, rack, $${meta.}"
      rx_preemptible    = "perhaps"
      rx_min_runtime    = "an hour"
      rx_preempt_grace  = "2h"
      rx_preempt_signal = "USR1"
    }
    disconnect {
      lost_after = "1m"
    }
    task "t" {
      driver = "raw_exec"
      config { command = "/bin/true" }
    }
  }

  group "required" {
    meta {
      rx_gang              = "true"
      rx_topology_required = "true"
      rx_min_runtime       = "-1s"
      rx_max_run_duration  = "forever"
      rx_gnag              = "true"
    }
    task "t" {
      driver = "raw_exec"
      config { command = "/bin/true" }
      meta { rx_gang = "true" }
    }
  }
  group "moved" {
    meta {
      rx_preemptible = "false"
      rx_movable     = "true"
    }
    task "t" {
      driver = "raw_exec"
      config { command = "/bin/true" }
    }
  }
}
