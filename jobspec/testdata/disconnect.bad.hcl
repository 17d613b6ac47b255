job "silent" {
  group "g" {
    max_client_disconnect      = "1h"
    prevent_reschedule_on_lost = true

    disconnect {
      lost_after           = "-1h"
      stop_on_client_after = "1m"
      reconcile            = "keep_orignal"
    }

    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
    }
  }
}
