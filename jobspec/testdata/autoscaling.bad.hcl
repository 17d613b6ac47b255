job "web" {
  group "g" {
    scaling {
      min = 0
      max = 10
      policy {
        cooldwn = "1m"
        stabilization_window = "2h"
        check "load" {
          source = "rxvision"
          query  = "in_flght"
          strategy "target-vlue" {
            target    = 0
            threshold = "a"
          }
        }
        check "other" {
          source = "prometheus"
          query  = "up"
          strategy "target-value" {
            target = 1
          }
        }
        check "none" {
          source = "rxvision"
          query  = "cpu"
        }
        check "day" {
          schedule {
            start = "0 8 * *"
            until = "x"
          }
          strategy "fixed-value" {
            value = 0
          }
        }
      }
    }
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
    }
  }
}
