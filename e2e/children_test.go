package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// TestDispatchAndPeriodic runs work through children with the unmodified nomad: dispatched with
// a file, with what comes in by a pipe and with meta; launched at a time and by hand.
func TestDispatchAndPeriodic(t *testing.T) {
	nomad := nomadBinary(t)
	p := newPlatform(t)
	p.start()

	p.nomad(0, "job", "run", "jobs/examples/dispatch.nomad.hcl").has(t, "Job registration successful")
	p.nomad(1, "job", "dispatch", "-meta", "label=x", "wordcount").has(t, "the payload that job \"wordcount\" requires")
	dispatched := regexp.MustCompile(`wordcount/dispatch-\d+-[0-9a-f]{8}`)
	logs := func(job, want string) {
		t.Helper()
		p.await(job+" prints "+want, func() bool {
			r := p.command(nomad, "alloc", "logs", "-job", job)
			return r.code == 0 && strings.Contains(r.text, want)
		})
	}
	file := write(t, "text", "one two three\n")
	child := dispatched.FindString(p.nomad(0, "job", "dispatch", "-meta", "label=shoe", "wordcount", file).text)
	logs(child, "label=shoe note= parent=wordcount\n3\n")
	r := p.command("/bin/sh", "-c", fmt.Sprintf("printf 'four five' | exec '%s' job dispatch -meta label=bag -meta note=quick wordcount -", nomad))
	piped := dispatched.FindString(r.text)
	if r.code != 0 || piped == "" {
		t.Fatalf("dispatch from a pipe: exit %d\n%s", r.code, r.text)
	}
	logs(piped, "label=bag note=quick parent=wordcount\n2\n")
	p.await("both have ended", func() bool {
		return regexp.MustCompile(`(?m)^0\s+0\s+2\s*$`).MatchString(p.nomad(0, "job", "status", "wordcount").text)
	})
	p.nomad(0, "job", "status", "wordcount").has(t, child, piped)

	p.nomad(0, "job", "run", "jobs/examples/periodic.nomad.hcl").has(t, "Approximate next launch time")
	forced := regexp.MustCompile(`nightly/periodic-\d+`).FindString(p.nomad(0, "job", "periodic", "force", "nightly").text)
	logs(forced, "report of "+forced)
	p.rxvision(0, "job", "stop", "nightly").has(t, "stopped")
	p.nomad(0, "job", "status", "nightly").has(t, "dead (stopped)", forced)

	src := `job "often" {
  type = "batch"
  periodic {
    crons = ["* * * * * * *"]
  }
  group "g" {
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
    }
  }
}
`
	p.rxvision(0, "job", "run", write(t, "often.nomad.hcl", src)).has(t, "registered")
	p.await("it was launched twice at its times", func() bool {
		return strings.Count(p.nomad(0, "job", "status", "often").text, "often/periodic-") >= 2
	})
	p.nomad(0, "job", "stop", "-purge", "often")
}
