job "web" {
  group "g" {
    network {
      mode = "host"
      port "http" {}
    }

    service {
      name     = "not_a_name"
      provider = "nomad"
      port     = "htp"

      check {
        name     = "one"
        type     = "htpp"
        interval = "10s"
        timeout  = "1s"
      }
      check {
        name     = "one"
        type     = "tcp"
        path     = "/x"
        interval = "1ms"
        timeout  = "0s"

        check_restart {
          limit = 3
          grace = "-1s"
        }
      }
      check {
        type     = "http"
        path     = "health"
        protocol = "gopher"
        method   = "LOOK"
        interval = "1s"
        timeout  = "1s"
        on_update = "never"
      }
    }

    service {
      name = "consul-one"
      tags = ["${attr.cpu.arch}"]
    }

    service {
      provider  = "nomad"
      on_update = "ignored"

      check {
        type     = "script"
        command  = "/bin/true"
        interval = "1s"
        timeout  = "1s"
      }
    }

    task "a" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
      service {
        provider = "nomad"
        task     = "b"
        weights {
          passing = 3
        }
      }
    }

    task "b" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
    }
  }
}
