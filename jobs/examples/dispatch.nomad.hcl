# A job that runs whenever it is dispatched, with a file and a word of its caller:
#
#   nomad job run jobs/examples/dispatch.nomad.hcl
#   nomad job dispatch -meta label=shoe wordcount README.md
#   nomad alloc logs -job DISPATCHED-JOB-ID
job "wordcount" {
  type = "batch"

  parameterized {
    payload       = "required"
    meta_required = ["label"]
    meta_optional = ["note"]
  }

  group "count" {
    task "count" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo label=$NOMAD_META_label note=$NOMAD_META_note parent=$NOMAD_JOB_PARENT_ID; wc -w < $NOMAD_TASK_DIR/in/text"]
      }

      dispatch_payload {
        file = "in/text"
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
