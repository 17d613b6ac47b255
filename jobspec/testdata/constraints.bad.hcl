job "constraints" {
  constraint {
    attribute = "${attr.kernel.name}"
    operator  = "regex"
    value     = "linux"
  }

  constraint {
    attribute = "${attr.kernel.name}"
    regexp    = "("
  }

  constraint {
    attribute = "${attr.driver.version}"
    version   = ">= banana"
  }

  constraint {
    attribute = "${attr.driver.version}"
    semver    = "~> 1.2.3"
  }

  constraint {
    attribute = "${atr.kernel.name}"
    value     = "linux"
  }

  constraint {
    operator = ">"
    value    = "1"
  }

  constraint {
    attribute = "${meta.rack}"
  }

  constraint {
    attribute = "${meta.rack}"
    operator  = "is_set"
    value     = "x"
  }

  constraint {
    distinct_property = "meta.rack"
    value             = "0"
  }

  constraint {
    operator = "distinct_hosts"
    value    = "perhaps"
  }

  group "g" {
    constraint {
      operator = "distinct_hots"
    }

    constraint {
      distinct_property = "${device.model}"
      value             = "two"
    }

    constraint {
      operator = "distinct_property"
    }

    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
      constraint {
        distinct_hosts = true
      }
      constraint {
        distinct_property = "${meta.rack}"
      }
    }
  }
}
