# A job that runs every night; one that has not ended keeps the next from beginning:
#
#   nomad job run jobs/examples/periodic.nomad.hcl
#   nomad job periodic force nightly
#   nomad job status nightly
job "nightly" {
  type = "batch"

  periodic {
    crons            = ["0 3 * * *"]
    time_zone        = "UTC"
    prohibit_overlap = true
  }

  group "report" {
    task "report" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo report of $NOMAD_JOB_ID; date -u"]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
