# Prints what a task is told about itself, once:
#
#   nomad job run jobs/examples/hello.nomad.hcl
#   nomad alloc logs -job hello
job "hello" {
  type = "batch"

  group "hello" {
    task "hello" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo $GREETING from $NOMAD_ALLOC_NAME; env | grep ^NOMAD_ | sort"]
      }

      env {
        GREETING = "Hello"
      }

      template {
        data        = "allocation {{ env \"NOMAD_ALLOC_ID\" }} in {{ env \"NOMAD_DC\" }}\n"
        destination = "local/where.txt"
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
