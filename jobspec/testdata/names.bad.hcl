job "two words" {
  type        = "servcie"
  priority    = 101
  region      = "elsewhere"
  namespace   = "no spaces please"
  node_pool   = "a/b"
  datacenters = ["dc1", "", "[x"]

  group "web" {
    count = -1

    task "x" {
      driver = "dokcer"
    }

    task "x" {
      driver = "docker"
    }

    task "../up" {
    }
  }

  group "web" {
  }
}
