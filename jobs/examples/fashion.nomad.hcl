# Serves the sample model behind the gateway:
#
#   rxvision model push fashion models/fashion/fashion.onnx
#   nomad job run jobs/examples/fashion.nomad.hcl
#   curl --data-binary @shirt.png http://127.0.0.1:8080/v1/models/fashion/classify
job "fashion" {
  type = "service"

  group "serve" {
    count = 1

    network {
      port "http" {} # the worker listens here; any free port of the node
    }

    update {
      min_healthy_time  = "1s"
      healthy_deadline  = "2m"
      progress_deadline = "5m"
    }

    task "serve" {
      driver = "onnx"

      config {
        model = "fashion" # the newest version; or fashion@ALIAS, fashion:VERSION
      }

      resources {
        cpu    = 200 # MHz
        memory = 256 # MiB
      }
    }
  }
}
