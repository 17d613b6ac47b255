job "config" {
  group "g" {
    network {
      port "api" {}
    }

    task "a" {
      driver = "raw_exec"
      config {
        comand   = "/bin/true"
        args     = "-v"
        work_dir = ["/tmp"]
        oom_score_adj = 10
      }
    }

    task "b" {
      driver = "raw_exec"
      config {
        command = ["/bin/true"]
        args    = ["-v", ["nested"]]
      }
    }

    task "c" {
      driver = "onnx"
      config {
        model   = "fash ion"
        threads = "many"
        port    = "apo"
        modle   = "x"
      }
    }

    task "d" {
      driver = "onnx"
    }

    task "e" {
      driver = "onnx"
      config {
        model = "fashion:0"
        port  = "api"
      }
    }

    task "f" {
      driver = "onnx"
      config {
        model = "fashion@prod uction"
        port  = "api"
      }
    }
  }
}
