"""A Django project in one file, as WSGI and as ASGI application."""

import os

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse
from django.urls import path

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="for tests only")


def root(request):
    return JsonResponse({"slot": int(os.environ["STEER_SLOT"]), "pid": os.getpid()})


urlpatterns = [path("", root)]
wsgi = get_wsgi_application()
asgi = get_asgi_application()
