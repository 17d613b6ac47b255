job "files" {
  type = "batch"

  meta {
    owner    = "me"
    rx_gnag  = "true"
    rx_queue = "gold"
  }

  migrate {}

  group "g" {
    update {
      max_parallel = 2
    }

    meta = {
      "rx_gang"  = "true"
      "rx_max_parallel" = "2"
    }

    network {
      port "http" {
        static = 80
      }
      port "https" {
        static = 80
      }
      port "a-b" {}
      port "big" {
        static = 70000
      }
    }

    network {
    }

    task "t" {
      driver = "exec"

      config {
        command = "/bin/true"
      }

      env {
        GOOD = "yes"
      }
    }

    task "u" {
      driver = "exec"

      config {
        command = "/bin/true"
        cap_add = ["net_admin"]
      }

      env = {
        "1BAD" = "x"
        "B=D"  = "x"
      }

      artifact {
      }

      artifact {
        source = "s3://bucket/key"
        mode   = "dir"
        options {
          checksum = "md5:abc"
          depth    = 1
        }
      }

      artifact {
        source      = "https://example.com/a.tar.gz"
        destination = "../../etc"
      }

      template {
        data        = "{{ if }"
        destination = "/local/../../x"
        perms       = "rwx"
        change_mode = "reload"
      }

      template {
        source = "local/a.tpl"
        data   = "x"
      }

      template {
        destination   = "local/b"
        change_mode   = "signal"
        change_signal = "SIGFOO"
      }
    }
  }
}
