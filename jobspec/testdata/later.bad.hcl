job "later" {
  type = "service"

  ui {
    description = "pretty"
  }

  vault {
    role = "r"
  }

  group "g" {
    consul {}

    volume "data" {
      type   = "host"
      source = "data"
    }

    disconnect {
      stop_on_client_after = "1h"
    }

    ephemeral_disk {
      sticky  = true
      migrate = true
    }

    network {
      mode     = "bridge"
      hostname = "h"
      port "a" {
        to           = 80
        host_network = "private"
      }
    }

    service {
      name     = "web"
      provider = "nomad"
      connect {
        sidecar_service {}
      }
    }

    task "t" {
      driver = "raw_exec"
      kind   = "connect-proxy:web"

      config {
        command = "/bin/true"
      }

      identity {
        name = "vault"
        aud  = ["x"]
      }

      action "a" {
        command = "/bin/true"
      }

      schedule {
        cron {
          start = "0 9 * * *"
          end   = "17 *"
        }
      }

      secret "s" {
        provider = "nomad"
        path     = "p"
      }

      csi_plugin {
        id   = "x"
        type = "node"
      }

      volume_mount {
        volume      = "data"
        destination = "/d"
      }

      restart {
        render_templates = true
      }

      logs {
        enabled = false
      }

      artifact {
        source      = "git::https://example.com/repo.git"
        destination = "local"
        chown       = true
      }

      template {
        data        = "{{ with secret \"a/b\" }}{{ .Data.x }}{{ end }}{{ range services }}{{ .Name }}{{ end }}{{ keyOrDefault \"a\" \"b\" | toLower }}"
        destination = "local/x"
        uid         = 5
        change_mode = "script"
        change_script {
          command       = "/bin/true"
          fail_on_error = false
        }
        wait {
          min = "1s"
          max = "2s"
        }
      }

      resources {
        cores      = 2
        memory     = 100
        memory_max = 200
        numa {
          affinity = "require"
        }
        network {
          port "old" {}
        }
      }
    }
  }
}
