job "unknown" {
  grup "g" {}
  prioirty = 5
  group "g" {
    cuont = 1
    task "t" {
      driver = file("/etc/passwd")
      kill_timeout = "soon"
      resources {
        cpu = "fast"
      }
    }
  }
}
