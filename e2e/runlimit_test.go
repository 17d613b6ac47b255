package e2e

import (
	"regexp"
	"strings"
	"testing"
)

// TestRunTimeLimit: what declares how long it runs is told so, ended then, shown as such by the nomad command line, and not
// begun again; on real processes.
func TestRunTimeLimit(t *testing.T) {
	nomad := nomadBinary(t)
	p := newPlatform(t)
	p.start()
	job := func(limit string) string {
		return write(t, "train.nomad.hcl", `job "train" {
  type = "batch"
  group "g" {
    meta {
      rx_max_run_duration = "`+limit+`"
    }
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sh"
        args    = ["-c", <<EOS
trap 'echo saved; exit 0' TERM
echo "at most $RX_MAX_RUN_DURATION seconds"
while :; do sleep 0.1; done
EOS
        ]
      }
      kill_signal = "SIGTERM"
      resources {
        cpu    = 20
        memory = 16
      }
    }
  }
}
`)
	}
	p.nomad(1, "job", "run", job("soon")).has(t, "rx_max_run_duration", `"soon" is no duration`)
	p.nomad(0, "job", "run", job("2s")).has(t, "finished with status \"complete\"")
	p.await("the end of the job", func() bool {
		r := p.command(nomad, "job", "status", "train")
		return r.code == 0 && regexp.MustCompile(`(?m)^Status\s+= dead`).MatchString(r.text)
	})
	status := p.nomad(0, "job", "status", "train").text
	allocs := regexp.MustCompile(`(?m)^([0-9a-f]{8})\s.*failed`).FindAllStringSubmatch(status, -1)
	if len(allocs) != 1 {
		t.Fatalf("%d allocations have failed:\n%s", len(allocs), status)
	}
	id := allocs[0][1]
	p.nomad(0, "alloc", "status", id).has(t, "Run Time Limit", "Run time limit of 2s reached", "Killing", "Killed")
	if out := p.nomad(0, "alloc", "logs", id).text; !strings.Contains(out, "at most 2 seconds\nsaved\n") {
		t.Errorf("it printed %q", out)
	}
	p.nomad(0, "job", "stop", "-purge", "train")
}
